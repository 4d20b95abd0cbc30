"""classroomkd: distil one student from many mentors, fast."""
