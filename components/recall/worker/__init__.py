"""Workers: the loop, the switch of releases, the stream's and the ad-hoc worker."""
