#![no_std]
//! Empty: it lets `cni-plugin` depend on this package, so that cargo rebuilds the
//! plugin when the programs change.
