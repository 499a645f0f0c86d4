"""The embedded world itself: what can be asked for, how it is drawn, and how pictures are read and judged."""
