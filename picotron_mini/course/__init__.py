"""What the lessons use besides the library: exercises, the bug museum, and the site."""
