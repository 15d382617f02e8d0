"""What steering did, to look at: tokens in a terminal or a page, plots, reports."""
