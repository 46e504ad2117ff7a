"""Objectives whose student or teacher learns from a discriminator alone, or nearly so."""
