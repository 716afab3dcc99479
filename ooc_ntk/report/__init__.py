"""What people see on the terminal: tables and progress."""
