"""Where filters lie in a kernel; layers around one; folding into one."""
