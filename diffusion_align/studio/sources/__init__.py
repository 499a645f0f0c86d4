"""Where pictures to judge come from: tables of pairs and folders; and how a picture leaves the server."""
