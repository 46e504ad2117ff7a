"""What a weight file says of itself: its header, a student's own facts, ComfyUI graphs, and what
other people's turbo files are."""
