"""PaST on LooGLE: closed-book short-dependency questions about long documents (README.md)."""
