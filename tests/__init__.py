"""The tests; `support` holds what they share, `bench` what is measured and not tested."""

from data.missing_packages import explain_missing_packages

explain_missing_packages()
