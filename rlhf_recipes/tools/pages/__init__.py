"""HTML pages of tools: what they share, and the certificate, which a page of its own and the report show."""
