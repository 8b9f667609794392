"""What everything else stands on: types, errors, processes, files."""
