//! Envoy's configurations: round robin by itself, and asking an Endpoint Picker.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::engines::Address;

/// A static round robin cluster, no access log.
pub fn round_robin(port: u16, engines: &[Address]) -> Value {
    let endpoints: Vec<_> = engines
        .iter()
        .map(|engine| json!({"endpoint": {"address": address(engine.http)}}))
        .collect();
    let cluster = json!({
        "name": "engines",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "load_assignment": {
            "cluster_name": "engines",
            "endpoints": [{"lb_endpoints": endpoints}],
        },
    });
    config(port, &[], &[cluster])
}

/// Every request, and its answer, over ext_proc to `picker`; the request goes where that says.
pub fn asking(port: u16, picker: u16) -> Value {
    let ext_proc = json!({
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.\
                      ExternalProcessor",
            "grpc_service": {
                "envoy_grpc": {"cluster_name": "picker", "authority": "localhost"},
                "timeout": "10s",
            },
            "message_timeout": "1000s",
            "processing_mode": {
                "request_header_mode": "SEND",
                "response_header_mode": "SEND",
                "request_body_mode": "FULL_DUPLEX_STREAMED",
                "response_body_mode": "FULL_DUPLEX_STREAMED",
                "request_trailer_mode": "SEND",
                "response_trailer_mode": "SEND",
            },
        },
    });
    let limits = json!({"thresholds": [{
        "max_connections": 40_000,
        "max_pending_requests": 40_000,
        "max_requests": 40_000,
    }]});
    let engines = json!({
        "name": "engines",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "circuit_breakers": limits,
        "original_dst_lb_config": {
            "use_http_header": true,
            "http_header_name": "x-gateway-destination-endpoint",
        },
    });
    let http2 = json!({
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    });
    let at = address(SocketAddr::from(([127, 0, 0, 1], picker)));
    let picker = json!({
        "name": "picker",
        "type": "STATIC",
        "circuit_breakers": limits,
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2,
        },
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at}}]}],
        },
    });
    config(port, &[ext_proc], &[engines, picker])
}

/// One listener, its filters, and everything to the cluster `engines`.
fn config(port: u16, filters: &[Value], clusters: &[Value]) -> Value {
    let router = json!({
        "name": "router",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
        },
    });
    let mut filters = filters.to_vec();
    filters.push(router);
    let manager = "type.googleapis.com/envoy.extensions.filters.network.\
                   http_connection_manager.v3.HttpConnectionManager";
    json!({"static_resources": {
        "listeners": [{
            "name": "in",
            "address": address(SocketAddr::from(([127, 0, 0, 1], port))),
            "filter_chains": [{"filters": [{
                "name": "http",
                "typed_config": {
                    "@type": manager,
                    "stat_prefix": "in",
                    "http_filters": filters,
                    "route_config": {"virtual_hosts": [{
                        "name": "all",
                        "domains": ["*"],
                        "routes": [{
                            "match": {"prefix": "/"},
                            "route": {"cluster": "engines", "timeout": "0s"},
                        }],
                    }]},
                },
            }]}],
        }],
        "clusters": clusters,
    }})
}

fn address(address: SocketAddr) -> Value {
    let (ip, port) = (address.ip().to_string(), address.port());
    json!({"socket_address": {"address": ip, "port_value": port}})
}
