"""Commands that answer until they are stopped: the server and the page."""
