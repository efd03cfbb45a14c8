"""What do the sums say? From sums to statements, tables, figures and the page."""
