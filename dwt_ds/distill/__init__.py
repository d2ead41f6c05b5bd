"""The objective as a module around the student, and the schedules of its weight and temperature."""
