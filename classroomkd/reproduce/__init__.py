"""`classroomkd reproduce`: tables of many runs, with the published numbers beside them."""
