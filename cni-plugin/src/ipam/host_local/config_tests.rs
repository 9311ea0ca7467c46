use serde_json::json;

use super::*;

fn parse(ipam: Value) -> Result<Config, ConfigError> {
    Config::parse(&ipam, Requests::default(), "1.1.0")
}

fn with_requests(network: Value, cni_args_ip: Option<&str>) -> Result<Config, ConfigError> {
    Config::parse(
        &network["ipam"],
        Requests::from_network(&network, cni_args_ip),
        "1.1.0",
    )
}

fn sets(config: &Config) -> Vec<String> {
    config
        .range_sets()
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn message(result: Result<Config, ConfigError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn the_legacy_range() {
    let config = parse(json!({
        "type": "host-local", "subnet": "10.1.2.0/24", "rangeStart": "10.1.2.9",
        "rangeEnd": "10.1.2.20", "gateway": "10.1.2.30", "somethingElse": [1]
    }))
    .unwrap();
    assert_eq!(sets(&config), ["10.1.2.9-10.1.2.20"]);
    assert_eq!(
        config.sets[0].ranges()[0].gateway(),
        "10.1.2.30".parse::<IpAddr>().unwrap()
    );
    assert_eq!(config.data_dir, Path::new("/var/lib/cni/networks"));
    assert_eq!(config.dns().unwrap(), Dns::default());
}

#[test]
fn sets_come_in_the_order_of_capability_legacy_ranges() {
    let config = with_requests(
        json!({
            "ipam": {
                "subnet": "10.1.0.0/24",
                "ranges": [[{"subnet": "10.2.0.0/24"}, {"subnet": "10.3.0.0/24"}], [{"subnet": "fd00::/64"}]],
            },
            "runtimeConfig": {"ipRanges": [[{"subnet": "10.4.0.0/24", "rangeEnd": "10.4.0.3"}]]},
        }),
        None,
    )
    .unwrap();
    assert_eq!(
        sets(&config),
        [
            "10.4.0.1-10.4.0.3",
            "10.1.0.1-10.1.0.254",
            "10.2.0.1-10.2.0.254,10.3.0.1-10.3.0.254",
            "fd00::1-fd00::ffff:ffff:ffff:ffff",
        ]
    );
}

#[test]
fn keys_in_any_case_and_go_cnis_flat_ip_ranges() {
    let config = with_requests(
        json!({
            "ipam": {"SUBNET": "10.1.0.0/24", "RangeStart": "10.1.0.7", "DataDir": "/run/leases"},
            "RuntimeConfig": {
                "IPRanges": [
                    {"Subnet": "10.9.0.0/16", "RangeStart": "10.9.1.0", "RangeEnd": "10.9.2.0", "Gateway": "10.9.0.1"},
                    {"Subnet": "fd09::/64", "RangeStart": "", "RangeEnd": "", "Gateway": ""}
                ],
                "Ips": ["10.9.1.3"]
            },
            "Args": {"CNI": {"IPS": ["10.1.0.8"]}}
        }),
        None,
    )
    .unwrap();
    assert_eq!(
        sets(&config),
        [
            "10.9.1.0-10.9.2.0",
            "fd09::1-fd09::ffff:ffff:ffff:ffff",
            "10.1.0.7-10.1.0.254"
        ]
    );
    assert_eq!(config.data_dir, Path::new("/run/leases"));
    assert_eq!(
        config.requested,
        ["10.1.0.8", "10.9.1.3"].map(|ip| ip.parse::<IpAddr>().unwrap())
    );
}

#[test]
fn requests_accumulate() {
    let network = json!({
        "ipam": {"subnet": "10.1.0.0/16"},
        "args": {"cni": {"ips": ["10.1.0.3", "10.1.0.2"]}},
        "runtimeConfig": {"ips": ["10.1.0.4/16", "::ffff:10.1.0.5", "fd00::7"]},
    });
    let config = with_requests(network, Some("10.1.0.2,fd00::9")).unwrap();
    let requested: Vec<_> = config.requested.iter().map(ToString::to_string).collect();
    assert_eq!(
        requested,
        [
            "10.1.0.2", "fd00::9", "10.1.0.3", "10.1.0.4", "10.1.0.5", "fd00::7"
        ]
    );

    let network =
        json!({"ipam": {"subnet": "10.1.0.0/16"}, "args": null, "runtimeConfig": {"ips": null}});
    assert!(
        with_requests(network, Some(""))
            .unwrap()
            .requested
            .is_empty()
    );
}

#[test]
fn bad_requests_are_named() {
    let network = |args: Value, runtime: Value| json!({"ipam": {"subnet": "10.1.0.0/16"}, "args": args, "runtimeConfig": runtime});
    let none = || Value::Null;
    for (network, env, expected) in [
        (
            network(none(), none()),
            Some("10.1"),
            "IP in CNI_ARGS is \"10.1\": it must be an IP address",
        ),
        (
            network(json!({"cni": {"ips": ["x"]}}), none()),
            None,
            "args.cni.ips[0] is \"x\"",
        ),
        (
            network(none(), json!({"ips": ["10.1.0.2", 7]})),
            None,
            "runtimeConfig.ips[1] is 7",
        ),
        (
            network(none(), json!({"ips": "10.1.0.2"})),
            None,
            "runtimeConfig.ips is \"10.1.0.2\": it must be a list",
        ),
        (
            network(none(), json!({"ipRanges": [7]})),
            None,
            "runtimeConfig.ipRanges[0] is 7: it must be a list",
        ),
        (
            network(none(), json!({"ipRanges": [{"subnet": 3}]})),
            None,
            "runtimeConfig.ipRanges[0].subnet is 3",
        ),
    ] {
        let message = message(with_requests(network, env));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn bad_configurations_are_named() {
    for (ipam, expected) in [
        (json!([]), "ipam is []: it must be an object"),
        (json!({}), "no IP ranges specified"),
        (json!({"ranges": []}), "no IP ranges specified"),
        (
            json!({"ranges": [[]]}),
            "invalid range set 0: empty range set",
        ),
        (
            json!({"ranges": {}}),
            "ipam.ranges is {}: it must be a list",
        ),
        (
            json!({"ranges": [{"subnet": "10.0.0.0/8"}]}),
            "ipam.ranges[0] is",
        ),
        (
            json!({"ranges": [[{"rangeStart": "10.0.0.1"}]]}),
            "invalid range set 0: the range has no subnet",
        ),
        (
            json!({"ranges": [[{"subnet": "10.0.0.0/8"}], [{"subnet": "11.0.0.0"}]]}),
            "ipam.ranges[1][0].subnet is \"11.0.0.0\": it must be a network",
        ),
        (
            json!({"subnet": "10.0.0.0/33"}),
            "ipam.subnet is \"10.0.0.0/33\"",
        ),
        (json!({"subnet": "::ffff:10.0.0.0/120"}), "ipam.subnet is"),
        (
            json!({"subnet": "10.0.0.0/8", "gateway": "10.0.0"}),
            "ipam.gateway is \"10.0.0\": it must be an IP address",
        ),
        (
            json!({"subnet": "10.0.0.0/8", "rangeEnd": 5}),
            "ipam.rangeEnd is 5: it must be a string",
        ),
        (
            json!({"subnet": "10.0.0.0/31"}),
            "invalid range set 0: network 10.0.0.0/31 is too small",
        ),
        (json!({"subnet": "10.0.0.1/8"}), "host bits set"),
        (
            json!({"subnet": "10.0.0.0/8", "ranges": [[{"subnet": "10.9.0.0/16"}]]}),
            "range set 0 overlaps with 1",
        ),
        (
            json!({"ranges": [[{"subnet": "10.0.0.0/16"}], [{"subnet": "10.1.0.0/16"}, {"subnet": "10.0.5.0/24"}]]}),
            "range set 0 overlaps with 1",
        ),
        (
            json!({"ranges": [[{"subnet": "10.0.0.0/16"}, {"subnet": "fd00::/64"}]]}),
            "invalid range set 0: mixed address families",
        ),
        (
            json!({"ranges": [[{"subnet": "10.0.0.0/16"}, {"subnet": "10.0.9.0/24"}]]}),
            "invalid range set 0: subnets 10.0.0.1-10.0.255.254 and 10.0.9.1-10.0.9.254 overlap",
        ),
        (
            json!({"subnet": "10.0.0.0/8", "dataDir": "networks"}),
            "ipam.dataDir is \"networks\": it must be an absolute path",
        ),
        (
            json!({"subnet": "10.0.0.0/8", "dataDir": 1}),
            "ipam.dataDir is 1: it must be a string",
        ),
        (
            json!({"subnet": "10.0.0.0/8", "resolvConf": []}),
            "ipam.resolvConf is []",
        ),
    ] {
        let message = message(parse(ipam));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn one_address_per_family_before_0_3_0() {
    let two = json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.2.0.0/24"}]]});
    let dual = json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00::/64"}]]});
    for (version, named) in [("", "0.1.0"), ("0.1.0", "0.1.0"), ("0.2.0", "0.2.0")] {
        let message = message(Config::parse(&two, Requests::default(), version));
        let expected =
            format!("CNI version {named} does not support more than 1 address per family");
        assert!(message.starts_with(&expected), "{message}");
        Config::parse(&dual, Requests::default(), version).unwrap();
    }
    for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        Config::parse(&two, Requests::default(), version).unwrap();
    }
}

#[test]
fn data_dir_needs_nothing_else() {
    let broken = json!({"ranges": "nonsense", "DATADIR": "/run/x"});
    assert_eq!(data_dir(&broken).unwrap(), Path::new("/run/x"));
    assert_eq!(
        data_dir(&json!({"dataDir": ""})).unwrap(),
        Path::new(DEFAULT_DATA_DIR)
    );
}

#[test]
fn routes() {
    let route = |route: Value| parse(json!({"subnet": "10.0.0.0/8", "routes": [route]}));
    let config = route(json!({
        "dst": "192.168.0.0/16", "GW": "10.0.0.9", "mtu": 1400, "advmss": 1360, "priority": 5,
        "table": 0, "scope": 253
    }))
    .unwrap();
    assert_eq!(
        config.routes,
        [Route {
            mtu: Some(1400),
            advmss: Some(1360),
            priority: Some(5),
            table: Some(0),
            scope: Some(253),
            ..Route::new(
                "192.168.0.0/16".parse().unwrap(),
                Some("10.0.0.9".parse().unwrap())
            )
        }]
    );
    let default = route(json!({"dst": "::/0", "mtu": 0, "gw": "", "scope": null})).unwrap();
    let bare = Route::new("::/0".parse().unwrap(), None);
    assert_eq!(default.routes, [bare]);

    for (value, expected) in [
        (
            json!({}),
            "ipam.routes[0].dst is null: it must be a network",
        ),
        (
            json!({"dst": "10.0.0.1"}),
            "ipam.routes[0].dst is \"10.0.0.1\"",
        ),
        (json!({"dst": "10.0.0.1/8"}), "without host bits"),
        (
            json!({"dst": "0.0.0.0/0", "gw": "fd00::1"}),
            "routes[0].gw is \"fd00::1\": it must be an address of the family of dst",
        ),
        (
            json!({"dst": "0.0.0.0/0", "gw": "gw"}),
            "routes[0].gw is \"gw\"",
        ),
        (
            json!({"dst": "0.0.0.0/0", "mtu": -1}),
            "routes[0].mtu is -1",
        ),
        (
            json!({"dst": "0.0.0.0/0", "priority": 4294967296_u64}),
            "routes[0].priority is 4294967296",
        ),
        (
            json!({"dst": "0.0.0.0/0", "table": "main"}),
            "routes[0].table is \"main\"",
        ),
        (
            json!({"dst": "0.0.0.0/0", "scope": 256}),
            "routes[0].scope is 256: it must be a whole number from 0 to 255",
        ),
        (
            json!("0.0.0.0/0"),
            "ipam.routes[0] is \"0.0.0.0/0\": it must be an object",
        ),
    ] {
        let message = message(route(value));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn resolv_conf() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let text = "# a comment\n; another\n\n  nameserver 192.0.2.53 \nnameserver 2001:db8::53%eth0\n\
        domain example.com\nsearch a.example.com\tb.example.com\nsearch c.example.com\n\
        options ndots:5\noptions timeout:1 rotate\nnameserver\nsortlist 10.0.0.0\nDOMAIN upper\n";
    std::fs::write(&path, text).unwrap();
    let config = parse(json!({"subnet": "10.0.0.0/8", "resolvConf": path})).unwrap();
    let dns = config.dns().unwrap();
    assert_eq!(dns.nameservers, ["192.0.2.53", "2001:db8::53%eth0"]);
    assert_eq!(dns.domain.as_deref(), Some("example.com"));
    assert_eq!(
        dns.search,
        ["a.example.com", "b.example.com", "c.example.com"]
    );
    assert_eq!(dns.options, ["ndots:5", "timeout:1", "rotate"]);

    std::fs::remove_file(&path).unwrap();
    let message = config.dns().unwrap_err().to_string();
    assert!(
        message.starts_with("reading ipam.resolvConf") && message.contains("resolv.conf"),
        "{message}"
    );
}
