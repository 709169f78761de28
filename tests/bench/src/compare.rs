//! What has become slower or faster since an older run.
