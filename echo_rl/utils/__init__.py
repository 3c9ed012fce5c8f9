"""What every room may use: files replaced whole, stores that are resumed, statistics, plotting."""
