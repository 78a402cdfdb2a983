"""What sparse prefill costs and gains in time. Law: all that is compared is timed on the same inputs."""
