"""Corpora and tokenizers: how they are fetched, built and checked."""
