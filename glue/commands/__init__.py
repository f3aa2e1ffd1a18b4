"""The commands of `pgcredits` that come in groups, a module for each."""
