"""What ``squish-nf4 inspect`` shows: tables on a terminal, JSON, a page with plots. checkpoint/audit measures."""
