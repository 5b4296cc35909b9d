"""Network modes: one file, one mode; a record goes in, a plan comes out."""
