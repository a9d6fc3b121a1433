"""Corpora and tokenizers: how they are fetched, built and checked."""

from data.missing_packages import explain_missing_packages

explain_missing_packages()
