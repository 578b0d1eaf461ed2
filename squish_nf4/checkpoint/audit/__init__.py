"""A squish directory looked at: verified, measured, compared with its source or with another one."""
