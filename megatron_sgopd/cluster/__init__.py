"""What a run takes of a machine, before it is started: memory, time, and which layouts fit."""
