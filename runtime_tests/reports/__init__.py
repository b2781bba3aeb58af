"""What people look at: terminal, HTML report, cards, CI summaries."""
