"""Processes that neither work nor end: finding and ending them."""
