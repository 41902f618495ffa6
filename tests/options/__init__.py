"""Laws from every option of every command to what the user gets."""
