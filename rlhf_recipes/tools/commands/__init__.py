"""The recipes as commands: their folder, their options read from source, their launch, and copies to edit."""
