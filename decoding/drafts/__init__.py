"""Ways to draft, one file each: functions that return a `decoding.drafter.Drafter`."""
