"""What every room uses: errors told in a sentence, command lines, secrets kept out of what is written, HTML pages."""
