"""What a token is: image, question, content word."""
