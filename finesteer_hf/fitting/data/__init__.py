"""From records to rows that are checked, templated, linted and split."""
