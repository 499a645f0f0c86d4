"""What people say of pictures: events appended to one file a person, what to ask next, agreement, and the export."""
