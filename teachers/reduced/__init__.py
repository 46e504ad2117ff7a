"""Networks of diffusers that do less work than their stock configs can say."""
