"""Everything that tests share: no file here is a test."""
