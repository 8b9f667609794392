"""A run's folder: what is written, checked, resumed and replayed."""
