"""Files and folders that appear complete or not at all, and the readers that everything shares."""
