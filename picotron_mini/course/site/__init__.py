"""The site: lessons, write-ups, questions and the library's documentation, from the repository's own files."""
