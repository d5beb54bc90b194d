"""What happens between steps, one idea a file."""
