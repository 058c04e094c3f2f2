"""The bugs of the museum, by the chapter that they belong to."""
