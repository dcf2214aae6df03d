PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE files (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	purpose VARCHAR NOT NULL, 
	filename VARCHAR NOT NULL, 
	size_bytes INTEGER NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	expires_at INTEGER, 
	deleted_at INTEGER, 
	UNIQUE (id)
);
INSERT INTO files VALUES(1,'file-f142a617258ba45e8512fc23acaaecd9','','batch','a.jsonl',1025,'d1eda34f1a100ccd95fd032466c8584eac3a616d2df4eae3aeda9622bde899f5',1700000000,NULL,NULL);
INSERT INTO files VALUES(2,'file-960fb508e82a3ac98906111885f85d07','','batch_output','batch_1d2228a8ea639ade003664694df9d286_output.jsonl',1660,'91a61438c2d4a9de8bf7836d59e142f628dec095c599c31ccba7d8b678430d05',1700000000,NULL,NULL);
INSERT INTO files VALUES(3,'file-95e8cc6c06c3c8cc6c7fb065f7814555','','batch_output','batch_1d2228a8ea639ade003664694df9d286_error.jsonl',179,'d92b7640226beae6757ff6d407d8b72511b2d2d92914190adbbbd243bf6d7e63',1700000000,NULL,NULL);
INSERT INTO files VALUES(4,'file-44fff3ba7443f800f3425ac0eff68448','ads','batch','a.jsonl',2,'a6fb08fda1acb957b6116bd37811a1fe41a01611c0631edbf786d6889a27a55c',1700000000,NULL,NULL);
INSERT INTO files VALUES(5,'file-e6193d6f574078f4623713c75fc35926','ads','batch','a.jsonl',2055,'a3384c4b6c041a823f083e62dd3709d22daa301d744286d6a00b4a2664f57273',1700000000,NULL,NULL);
INSERT INTO files VALUES(6,'file-5f3bc486b8c2ad54b0693cd8cad84e6c','','batch','a.jsonl',513,'8078458b73b67ea9e60da50b8ca106e724b8ba23d89775862015c846e750befe',1700000000,NULL,NULL);
INSERT INTO files VALUES(7,'file-71a52abec1bd800cafaf2bf216d38083','','batch','a.jsonl',342,'0bfb24d52e54167607444e38e348ff7bfa2334009f639df93ba20b6e268380a2',1700000000,1700003600,NULL);
INSERT INTO files VALUES(8,'file-6cc18899550e5c5c958fb9b834f36b8e','','batch','a.jsonl',171,'d7bd09ed5afe4c0c0133cb37bbf1354aea0b24c20029e9647f316c774e371322',1700000000,NULL,1700000000);
CREATE TABLE batches (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR NOT NULL, 
	tenant VARCHAR NOT NULL, 
	endpoint VARCHAR NOT NULL, 
	input_file_id VARCHAR NOT NULL, 
	completion_window VARCHAR NOT NULL, 
	reuse_results BOOLEAN NOT NULL, 
	status VARCHAR NOT NULL, 
	ending VARCHAR, 
	model VARCHAR, 
	metadata_json VARCHAR, 
	errors_json VARCHAR, 
	output_expires_after_seconds INTEGER, 
	created_at INTEGER NOT NULL, 
	expires_at INTEGER NOT NULL, 
	in_progress_at INTEGER, 
	finalizing_at INTEGER, 
	completed_at INTEGER, 
	failed_at INTEGER, 
	expired_at INTEGER, 
	cancelling_at INTEGER, 
	cancelled_at INTEGER, 
	total INTEGER, 
	fingerprint VARCHAR, 
	completed INTEGER NOT NULL, 
	failed INTEGER NOT NULL, 
	input_tokens INTEGER NOT NULL, 
	cached_tokens INTEGER NOT NULL, 
	output_tokens INTEGER NOT NULL, 
	reasoning_tokens INTEGER NOT NULL, 
	output_file_id VARCHAR, 
	error_file_id VARCHAR, 
	UNIQUE (id), 
	FOREIGN KEY(input_file_id) REFERENCES files (id)
);
INSERT INTO batches VALUES(1,'batch_1d2228a8ea639ade003664694df9d286','','/v1/chat/completions','file-f142a617258ba45e8512fc23acaaecd9','24h',0,'completed','completed','fake-model','{"n":"done"}',NULL,NULL,1700000000,1700086400,1700000000,1700000000,1700000000,NULL,NULL,NULL,NULL,6,'fake-model@0123456789abcdef',5,1,50,20,15,0,'file-960fb508e82a3ac98906111885f85d07','file-95e8cc6c06c3c8cc6c7fb065f7814555');
INSERT INTO batches VALUES(2,'batch_e62f00f963b919d3c67c9ac7a1ec718e','ads','/v1/chat/completions','file-44fff3ba7443f800f3425ac0eff68448','24h',0,'failed','failed',NULL,'{"n":"failed"}','[{"code":"invalid_json_line","message":"The line is not valid JSON: unexpected end of data (column 2).","param":null,"line":1}]',NULL,1700000000,1700086400,NULL,NULL,NULL,1700000000,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,NULL,NULL);
INSERT INTO batches VALUES(3,'batch_7f1ba4da1897a553b48877a40ddae539','ads','/v1/chat/completions','file-e6193d6f574078f4623713c75fc35926','24h',0,'in_progress',NULL,'fake-model','{"n":"running"}',NULL,NULL,1700000000,1700086400,1700000000,NULL,NULL,NULL,NULL,NULL,NULL,12,'fake-model@0123456789abcdef',0,0,0,0,0,0,NULL,NULL);
INSERT INTO batches VALUES(4,'batch_4419e0b313b7826ead20972467291c8c','','/v1/chat/completions','file-5f3bc486b8c2ad54b0693cd8cad84e6c','24h',0,'validating',NULL,NULL,'{"n":"validating"}',NULL,NULL,1700000000,1700086400,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,0,0,0,0,0,0,NULL,NULL);
CREATE TABLE idempotency_keys (
	tenant VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	request_sha256 VARCHAR NOT NULL, 
	batch_id VARCHAR NOT NULL, 
	created_at INTEGER NOT NULL, 
	PRIMARY KEY (tenant, "key"), 
	FOREIGN KEY(batch_id) REFERENCES batches (id)
);
INSERT INTO idempotency_keys VALUES('','key-1','702cfb2c0e5b84955a6066444fc51f49d2946b92f2a727914670f30bd4d21bc4','batch_1d2228a8ea639ade003664694df9d286',1700000000);
INSERT INTO idempotency_keys VALUES('','key-2','d56920d6399f4de1fe83d76668020da759c1b951604aa95b9359c71b018d69ed','batch_4419e0b313b7826ead20972467291c8c',1700000000);
DELETE FROM sqlite_sequence;
INSERT INTO sqlite_sequence VALUES('files',8);
INSERT INTO sqlite_sequence VALUES('batches',4);
CREATE INDEX ix_files_sha256 ON files (sha256);
CREATE INDEX batches_by_status ON batches (status, ending);
COMMIT;
PRAGMA user_version = 3;
