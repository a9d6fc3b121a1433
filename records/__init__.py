"""Record folders, and the tools that make, check and score them."""

from data.missing_packages import explain_missing_packages

explain_missing_packages()
