"""Computing no more than a token needs: exits trained and asked, thresholds calibrated, drafts verified."""
