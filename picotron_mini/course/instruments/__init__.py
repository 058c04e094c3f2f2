"""What measures, in a lesson or a check, what ranks keep, send and wait for."""
