"""Workers: the loop, the source of its release, the stream's and the ad-hoc worker."""
