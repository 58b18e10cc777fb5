//! Sockets and tasks: proxy, event subscribers, discovery, scraping, admin.
