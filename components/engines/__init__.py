"""Engines that Ibis expressions run on."""
