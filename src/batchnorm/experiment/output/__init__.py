"""What a study shows and leaves behind: progress, the files in its folder, versions and commit."""
