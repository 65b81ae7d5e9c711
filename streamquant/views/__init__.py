"""What the commands show: tables and sentences made of their results, printed by a `Screen`. A module for each command."""
